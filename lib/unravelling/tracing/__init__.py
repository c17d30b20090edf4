"""From a model to the parts of a chain: trace it, read its graph, make modules of the stretches that were found."""
