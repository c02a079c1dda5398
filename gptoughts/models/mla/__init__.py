"""Dense decoder with multi-head latent attention."""
