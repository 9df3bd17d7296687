"""Share explainers: cards, code that travels with the weights, pushing, and finding them."""
