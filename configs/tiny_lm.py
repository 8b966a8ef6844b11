"""A byte-level Qwen3-MoE of 4.0 M parameters, trained on the source files of Python's standard library.

    python experiments/train_tiny_lm.py --config=configs/tiny_lm.py --output_dir=checkpoints/tiny_lm

The whole run is 4000 steps. Two CPU cores need about half a minute per step, more than a day in all, and 11 GiB of
memory. Expect 1.05 bits per byte on held-out files at the end.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The sections `model` (named as in Hugging Face's config.json), `train`, and `demo` (for experiments/demo.py)."""
    config = ConfigDict()
    config.model = ConfigDict(
        dict(
            model_type="qwen3_moe",
            vocab_size=256,  # bytes
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            norm_topk_prob=True,
            rope_theta=1e4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.02,
        )
    )
    config.train = ConfigDict(
        dict(
            seed=0,
            steps=4_000,
            batch_size=64,
            sequence_length=512,
            learning_rate=2e-3,
            final_learning_rate=2e-5,
            warmup_steps=200,
            weight_decay=1.0,  # the run reads the corpus 13 times, and with a weaker decay the model memorizes it
            clip_norm=1.0,
            balance_loss_weight=0.01,
            compute_dtype="auto",  # bfloat16 on an accelerator, float32 on a CPU; weights are float32
            steps_per_call=20,  # steps per entry of the log, which holds their mean loss
            eval_every=500,
            checkpoint_every=500,
            eval_batch_size=32,
        )
    )
    config.demo = ConfigDict(
        dict(
            windows=32,  # number of held-out windows to evaluate, spread evenly over the text
            sequence_length=512,
            batch_size=8,
            calibration_windows=16,  # windows of training text that the activation scales come from
        )
    )
    return config
