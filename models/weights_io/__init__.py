"""Weights on disk: reading and writing the layouts in which latent diffusion models are published."""
