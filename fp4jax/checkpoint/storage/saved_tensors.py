"""Collects the tensors to save of a model whose layers hold plain weights, NVFP4 or block-wise FP8.

Each projection of each expert becomes a linear layer with tensors of its own, under the names that Hugging Face
checkpoints use. Weights that were packed for the grouped GEMM's kernel are unpacked, and the rows and columns that pad
an expert to a size that the kernel supports are removed.
"""

from typing import Any

import jax
import numpy as np

from fp4jax.block_fp8 import BlockFP8Weights
from fp4jax.checkpoint.match import at, model_params
from fp4jax.checkpoint.names import Path as ParamPath, expert_modules, module_name, stacked_name, tensor_slots
from fp4jax.checkpoint.storage.kept_scales import reciprocal
from fp4jax.checkpoint.storage.layouts import NAMES, SCALE_SHAPES, Layout
from fp4jax.grouped_gemm.packed_weights import PackedWeights, arrange_experts, packed_if
from fp4jax.layers import MoEBlock, NVFP4Linear
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.quant_config.methods import BF16, FP8_STORED, FP8_STORED_UE8M0, Method


class SavedTensors:
    """The tensors of a model as a folder stores them.

    tensors: the arrays by tensor name, the scales of a KV cache included. methods: the method of each linear layer, by
    its name. kept_scales: the exact global scales by tensor name; see the module `kept_scales`.

    Args:
      model: a model of `fp4jax.models`.
      dtype: the type to store plain weights in.
      layout: the layout of NVFP4 layers.

    Raises:
      ValueError: rows of one NVFP4 layer have different global scales, which a folder cannot express: it has one global
        scale per layer. The message names the parameter.
    """

    def __init__(self, model: Any, dtype: Any, layout: Layout):
        self.tensors: dict[str, np.ndarray] = {}
        self.methods: dict[str, Method] = {}
        self.kept_scales: dict[str, list[Any]] = {}
        self._layout: Layout = layout
        plain = {}
        for path, value in _values(model).items():
            if isinstance(value, NVFP4Tensor):
                self._add_nvfp4(model, path, value)
            elif isinstance(value, BlockFP8Weights):
                self._add_fp8(model, path, value)
            else:
                plain[path] = np.asarray(jax.device_get(value))
        self._add_plain(model, plain, dtype)
        for index, layer in enumerate(model.layers):
            for name in ("k_scale", "v_scale"):
                if (scale := getattr(layer.self_attn, name, None)) is not None:
                    projection = module_name(("layers", index, "self_attn", f"{name[0]}_proj"))
                    self.tensors[f"{projection}.{name}"] = np.asarray(jax.device_get(scale[...]))

    def _add_plain(self, model: Any, plain: dict[ParamPath, np.ndarray], dtype: Any) -> None:
        shapes = {path: value.shape for path, value in plain.items()}
        for name, slot in tensor_slots(shapes, getattr(model, "TENSOR_NAMES", {})).items():
            value = plain[slot.path]
            if slot.expert is not None:
                value = value[slot.expert, slot.start : slot.start + slot.shape[0]]
            value = value if slot.path[-1] == "correction_bias" else value.astype(dtype)
            # ERNIE checkpoints store this bias as [1, E]: the first axis counts groups of experts.
            self.tensors[name] = value[None] if ".moe_statics." in name else value
            if name.endswith(".weight") and len(slot.shape) == 2 and slot.path[0] != "embed_tokens":
                self.methods[name.removesuffix(".weight")] = BF16

    def _add_fp8(self, model: Any, path: ParamPath, value: BlockFP8Weights) -> None:
        module = module_name(path[:-1])
        qdata, block_scale = jax.device_get((value.qdata, value.block_scale))
        self.tensors |= {f"{module}.weight": np.asarray(qdata), f"{module}.weight_scale_inv": np.asarray(block_scale)}
        powers = at(model, path[:-1]).power_of_two_scales
        self.methods[module] = FP8_STORED_UE8M0 if powers else FP8_STORED

    def _add_nvfp4(self, model: Any, path: ParamPath, value: NVFP4Tensor) -> None:
        owner = at(model, path[:-1])
        value = jax.device_get(value)
        if stacked_name(path) is None:
            scales = np.asarray(value.global_scale).reshape(-1, 1)
            given = None if owner.input_scale is None else jax.device_get(owner.input_scale[...])
            self._add_layer(path, module_name(path[:-1]), value, scales, given, owner.activation_format)
            return
        first = path[-1] == "w13"
        scale = owner.input_scale_1 if first else owner.input_scale_2
        scale = None if scale is None else np.asarray(jax.device_get(scale[...])).reshape(-1)
        activations = owner.config.activation_format_1 if first else owner.config.activation_format_2
        for module, expert, start, rows in expert_modules(path, value.shape):
            part = slice(start, start + rows)
            layer = NVFP4Tensor(value.qdata[expert, part], value.block_scale[expert, part], None)
            scales = np.asarray(value.global_scale[expert])
            scales = scales[part] if scales.size > 1 else scales
            given = None if scale is None else scale[0] if first else scale[expert]
            self._add_layer(path, module, layer, scales, given, activations)

    def _add_layer(
        self, path: ParamPath, module: str, w: NVFP4Tensor, scales: Any, input_scale: Any, activations: str | None
    ) -> None:
        """Adds the tensors and the method of one NVFP4 linear layer.

        Args:
          path: the parameter, for messages.
          module: the layer's name in the folder.
          w: the layer's codes and block scales.
          scales: the layer's global scales, which must all be equal.
          input_scale: the scale of the layer's activations, None if there is none.
          activations: the format of the layer's activations; None: "nvfp4" if there is an input scale, else "bf16".
        """
        if (scales != scales.flat[0]).any():
            raise ValueError(
                f"{'.'.join(map(str, path))}: the rows of {module} have global scales of their own, from "
                f"{scales.min()} to {scales.max()}; a folder has one per projection"
            )
        names = [f"{module}.{end}" for end in NAMES[self._layout]]
        self.tensors |= {names[0]: np.asarray(w.qdata), names[1]: np.asarray(w.block_scale)}
        self._add_scale(names[2], scales.flat[0])
        if input_scale is not None:
            self._add_scale(names[3], input_scale)
        activations = activations or ("bf16" if input_scale is None else "nvfp4")
        per_token = activations == "nvfp4" and input_scale is None
        self.methods[module] = Method("nvfp4", self._layout, activations, "per_token" if per_token else "stored")

    def _add_scale(self, name: str, scale: Any) -> None:
        decode = np.full(SCALE_SHAPES[self._layout], scale, np.float32)
        if self._layout == "modelopt":
            self.tensors[name] = decode
            return
        self.tensors[name] = stored = reciprocal(decode)
        if reciprocal(stored).tobytes() != decode.tobytes():
            self.kept_scales[name] = [decode.astype("<f4").tobytes().hex(), []]


def _values(model: Any) -> dict[ParamPath, Any]:
    """Returns the model's weights by path, without activation scales; weights packed for the kernel are unpacked."""
    found = {path: param.get_value() for path, param in model_params(model).items()}
    for path in list(found):
        owner = at(model, path[:-1])
        if isinstance(owner, MoEBlock) and path[-1] == "w13":
            w2 = (*path[:-1], "w2")
            pair = arrange_experts(found[path], found[w2], owner.intermediate_size, packed=False)
            found[path], found[w2] = pair
        elif isinstance(owner, NVFP4Linear) and isinstance(found[path], PackedWeights):
            found[path] = jax.tree.map(lambda leaf: leaf[0], packed_if(found[path], False))
    return found
