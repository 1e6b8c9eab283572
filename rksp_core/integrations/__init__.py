"""The loop for trainers that are not yours to change: a callback that obeys, adds the KSS term and writes profiles.

    from rksp_core.integrations.huggingface import RkspCallback     # pip install 'rksp[hf]'
    from rksp_core.integrations.lightning import RkspCallback       # pip install 'rksp[lightning]'

    callback = RkspCallback("runs/my-run", probe=probe, profile_every=20)
    trainer = Trainer(..., callbacks=[callback])

and beside it ``rksp watch runs/my-run --enforce``. A loop of your own, with Accelerate or without, needs no adapter:
`rksp_core.KSSRegularizer` as the context of the forward pass, and one `rksp_core.ControlFollower`.
Each module here imports its trainer when it is imported itself, never before. `loop.py` is what both callbacks share.
"""
