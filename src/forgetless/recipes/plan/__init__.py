"""`plan`: what to train, how, why, and what it will cost, before any weight is loaded."""
