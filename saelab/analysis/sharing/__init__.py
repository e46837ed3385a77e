"""SAEs for others: a folder with a model card, the hub, and Neuronpedia's format."""
