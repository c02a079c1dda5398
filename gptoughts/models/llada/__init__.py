"""Family ``llada``: a masked-diffusion language model."""
