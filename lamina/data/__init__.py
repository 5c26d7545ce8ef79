"""Tasks in order: streams, the images they are made of, and the batches they come in."""
