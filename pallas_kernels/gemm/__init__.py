"""The grouped GEMM with 4-bit weights: kernel, configurations, roles of warpgroups, tasks and weight layout."""
