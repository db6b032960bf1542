def rope_tables(config_or_theta, head_dim, max_positions, *, scaling=None, device=None):
    raise NotImplementedError
