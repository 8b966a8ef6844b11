"""The grouped GEMM with 4-bit weights: its configurations, roles of warpgroups, tasks and weight layout."""
