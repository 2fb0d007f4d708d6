"""Structures as frozen dataclasses with the field names of the diffusers `config.json` files that they read and write.

A UNet or autoencoder is described by its JSON alone. A field that this code does not implement must have the value that
leaves it off, otherwise reading fails with `UnsupportedStructure`: a model is never loaded half-understood.
"""

from models.config.autoencoder import AutoencoderConfig
from models.config.fields import UnsupportedStructure
from models.config.schedule import ScheduleConfig
from models.config.unet import UNetConfig

__all__ = ["AutoencoderConfig", "ScheduleConfig", "UNetConfig", "UnsupportedStructure"]
