"""ViT-Shapley (arXiv 2206.05282): the rival that learns one explainer for each task."""
