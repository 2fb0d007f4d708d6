"""Training of both stages of latent diffusion, the data that they learn from, and their scores."""
