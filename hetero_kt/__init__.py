"""Knowledge transfer between models that share nothing: architecture, task, modality. Start reading in `run`."""
