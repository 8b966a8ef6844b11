"""The files of a checkpoint: reading and writing safetensors, and the layouts in which weights are stored there."""
