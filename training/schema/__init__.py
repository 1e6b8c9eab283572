"""The sections of a trainer's YAML as pydantic models. No torch here: a configuration is checked cheaply."""
