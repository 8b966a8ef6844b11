"""Training a byte-level Mixture-of-Experts model: one step, and a run that can be stopped after any step."""

import math
from collections import deque
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.text.corpora import Corpus, windows
from experiments.text.evaluation import cross_entropy, evaluate
from experiments.training.run_limits import RunLimits, Stopped
from experiments.training.state import History, TrainState, restore_state, run_identity, save_state, write_log
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig, configure_experts


def compute_dtype(train: ConfigDict) -> str:
    """The dtype of activations; "auto" is float32 on CPUs, which emulate bfloat16 slowly, and else bfloat16."""
    if train.compute_dtype != "auto":
        return train.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_optimizer(train: ConfigDict) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay of the learning rate; vectors, such as norms, have no weight decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, train.warmup_steps, train.steps, train.final_learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=train.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )


def sample_batch(data: jax.Array, seed: int, step: jax.Array, batch_size: int, length: int) -> jax.Array:
    """A batch of windows at random places of `data`, i32 [batch_size, length + 1].

    The places depend on the seed and the step only, so a continued run draws the same batches.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    starts = jax.random.randint(key, (batch_size, 1), 0, data.shape[0] - length)
    return data[starts + jnp.arange(length + 1, dtype=starts.dtype)[None, :]].astype(jnp.int32)


def loss_fn(params: Any, graphdef: nnx.GraphDef, ids: jax.Array, balance_weight: float) -> tuple[jax.Array, Any]:
    """The loss of a batch, for `jax.grad`.

    Args:
      params: the parameters.
      graphdef: the rest of the model.
      ids: i32 [B, length + 1]; the model predicts every id from those before it.
      balance_weight: the factor of the balance loss.

    Returns:
      The cross-entropy in nats per byte plus the weighted balance loss (its mean over the MoE layers), and both parts
      without the weight, f32 [2].
    """
    model = nnx.merge(graphdef, params)
    output = model.forward(ids[:, :-1])
    nats = jnp.mean(cross_entropy(output.logits, ids[:, 1:]))
    balance = output.aux.balance_loss / max(len(model.moe_blocks()), 1)
    return nats + balance_weight * balance, jnp.stack([nats, balance])


def make_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, train: ConfigDict):
    """The jitted function of one step: (state, data) -> (next state, f32 [2] with nats per byte and balance loss)."""

    def step(state: TrainState, data: jax.Array) -> tuple[TrainState, jax.Array]:
        ids = sample_batch(data, train.seed, state.step, train.batch_size, train.sequence_length)
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, parts = gradient(state.params, graphdef, ids, train.balance_loss_weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), parts

    return jax.jit(step)  # the old state is not donated: it is what is saved if the run ends before the step


class Training:
    """A training run, as far as it has come.

    The batches follow from the seed and the step. So the state, the log, and the losses since the last log entry are
    all that has to be saved.

    Attributes:
      step: the number of finished steps.
      state: the state after them.
      in_flight: (state, losses) of the later steps that the device has been given, oldest first.
      history: the log, and the losses since its last entry.
      saved_step: the step of the state on disk; -1: there is none.
    """

    def __init__(self, config: ConfigDict, corpus: Corpus, state_path: Path, limits: RunLimits):
        self.settings, self.state_path, self.limits = config.train, state_path, limits
        model_config = Qwen3MoeConfig.from_hf({**config.model, "dtype": compute_dtype(config.train)})
        model = Qwen3Moe(model_config, param_dtype=jnp.float32, rngs=nnx.Rngs(config.train.seed))
        configure_experts(model, differentiable=True)
        self.graphdef, params = nnx.split(model)
        self.optimizer = make_optimizer(config.train)
        self.state = TrainState(params, jax.jit(self.optimizer.init)(params), jnp.int32(0))
        self.history, self.run = History([], []), run_identity(config, corpus)
        self.data = jnp.asarray(corpus.train)
        self.held_out = windows(corpus.held_out, config.train.sequence_length)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.step, self.saved_step = 0, -1
        self.in_flight: deque[tuple[TrainState, Any]] = deque()
        device = jax.devices()[0].device_kind
        self.summary = {"parameters": self.parameters, "corpus_digest": corpus.digest, "device": device}
        logging.info(
            "%d parameters, %d training bytes in %d files, %d held-out bytes in %d files, computing in %s on %s",
            *(self.parameters, len(corpus.train), len(corpus.train_files)),
            *(len(corpus.held_out), len(corpus.held_out_files), model_config.dtype, device),
        )

    def restore(self) -> None:
        """Continue from the saved state.

        Raises:
          ValueError: the file belongs to a run with other settings, or is not a saved state.
        """
        self.state, self.history = restore_state(self.state_path, self.state, self.run)
        self.step = self.saved_step = int(self.state.step)
        logging.info("continuing %s at step %d", self.state_path, self.step)

    def save(self) -> None:
        """Write the state, unless the state of this step is on disk already."""
        if self.saved_step != self.step:
            save_state(self.state_path, self.state, self.history, self.run)
            self.saved_step = self.step

    def compile(self) -> jax.stages.Compiled:
        """Compile the program of one step."""
        return make_step(self.graphdef, self.optimizer, self.settings).lower(self.state, self.data).compile()

    def start_step(self, program: Any) -> None:
        """Give the device one more step, which starts from the last step in flight."""
        last = self.in_flight[-1][0] if self.in_flight else self.state
        self.in_flight.append(program(last, self.data))

    def finish_steps(self, left: int) -> None:
        """Wait until at most `left` steps are in flight, and record the losses of the steps that finished.

        Raises:
          FloatingPointError: a loss is not finite.
          Stopped: the run must end.
        """
        while len(self.in_flight) > left:
            self.limits.wait(self.in_flight[0][1].is_ready)
            self.state, losses = self.in_flight.popleft()
            self.step += 1
            nats, balance = np.asarray(losses).tolist()
            if not math.isfinite(nats):
                raise FloatingPointError(f"the loss is {nats} after step {self.step}; try a lower learning rate")
            self.history.losses.append([nats, balance])
            if self.step % self.settings.steps_per_call == 0:
                nats, balance = np.mean(self.history.losses, axis=0).tolist()
                entry = {"step": self.step, "train_bits_per_byte": nats / math.log(2), "balance_loss": balance}
                self.history.log.append(entry)
                self.history.losses.clear()

    def is_due(self, every: int) -> bool:
        """Whether an action is due before the next step: it is done every `every` steps, and after the last step."""
        step = self.step + len(self.in_flight)
        return step > 0 and (step % every == 0 or step == self.settings.steps)

    def evaluate(self) -> None:
        """Add the held-out bits per byte to the last entry of the log, unless the entry has them already."""
        entry = self.history.log[-1]
        if "held_out_bits_per_byte" not in entry:
            model = nnx.merge(self.graphdef, self.state.params)
            found = self.limits.apart(lambda: evaluate(model, self.held_out, self.settings.eval_batch_size))
            entry["held_out_bits_per_byte"] = found.bits_per_byte
            tqdm.write(
                f"step {self.step}: training {entry['train_bits_per_byte']:.4f}, held out {found.bits_per_byte:.4f} "
                f"bits per byte, balance loss {entry['balance_loss']:.3f}, {self.limits.elapsed():.0f} s"
            )


def train(run: Training, output_dir: Path) -> nnx.Module:
    """Run the steps that are left, and return the trained model.

    Raises:
      Stopped: the run must end. The state and the log have been saved.
    """
    settings, first = run.settings, run.step
    try:
        with tqdm(total=settings.steps, initial=run.step, unit="step", desc="compiling") as progress:
            program = run.limits.apart(run.compile) if run.step < settings.steps else None
            progress.set_description("training")
            while True:
                evaluation, saving = run.is_due(settings.eval_every), run.is_due(settings.checkpoint_every)
                run.finish_steps(left=0 if evaluation or saving else 1)
                progress.update(run.step - progress.n)
                if run.history.log:
                    progress.set_postfix(bpb=f"{run.history.log[-1]['train_bits_per_byte']:.3f}", refresh=False)
                if evaluation:
                    run.evaluate()
                if saving:
                    run.save()
                if run.step == settings.steps:
                    break
                run.start_step(program)
    except Stopped:
        run.save()
        write_log(output_dir, run.history.log, run.summary)
        raise
    logging.info("%d steps in %.0f s", run.step - first, run.limits.elapsed())
    write_log(output_dir, run.history.log, run.summary)
    return nnx.merge(run.graphdef, run.state.params)
