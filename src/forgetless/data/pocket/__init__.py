"""The embedded world: real facts, a small base model that knows them, and new skills to learn.

Nothing here is downloaded, and importing this package imports no torch.
"""
