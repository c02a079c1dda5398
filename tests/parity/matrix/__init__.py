"""Every feasible layout of every family on up to four ranks, compared with the one-rank run of the same model."""
