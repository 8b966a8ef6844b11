"""Quantization sections of checkpoints, and what users ask for, as the tests of several rooms use them."""

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.mlp.gate", "*self_attn*"]}
FLOAT4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["re:.*lm_head"],
    "config_groups": {"group_0": {"weights": FLOAT4, "input_activations": FLOAT4, "targets": ["Linear"]}},
}  # fmt: skip
# As users of the serving system write it on the command line.
REFERENCE = (
    '{"quantization":"mix_quant","dense_quant_type":"block_wise_fp8","is_moe_quantized":true,'
    '"moe_quant_type":"modelopt_fp4"}'
)
USERS = {
    "none": None,
    "fp8": '{"quantization": "block_wise_fp8"}',
    "reference": REFERENCE,
    "online": {"quantization": "mix_quant", "dense_quant_type": "block_wise_fp8", "moe_quant_type": "modelopt_fp4"},
    "experts": {"quantization": "mix_quant", "moe_quant_type": "modelopt_fp4", "is_moe_quantized": True},
    "nothing": {"quantization": "mix_quant"},
}
