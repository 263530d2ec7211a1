"""Training of an adapter or of a whole model on `transformers.Trainer`, resumable at any moment."""
