"""Tools that write new checkpoints: quantizing a folder to NVFP4, and converting a folder to the other NVFP4 layout."""
