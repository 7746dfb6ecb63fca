"""HiFi-GAN: a vocoder trained against discriminators of periods and scales."""
