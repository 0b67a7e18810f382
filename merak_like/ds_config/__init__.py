"""A user's ``ds_config.json``, honoured or refused key by key. DeepSpeed itself is not needed for that."""
