"""From a folder of plain weights to a quantized one, and from one layout to another."""
