"""Latent diffusion in PyTorch: autoencoder, UNet, text encoder, schedule, samplers, tasks and weights on disk."""
