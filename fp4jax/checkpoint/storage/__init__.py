"""Tensors in the files of a checkpoint: read, laid out as stored, written."""
