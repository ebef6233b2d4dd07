"""One attention core for every method: processors made of parts (mask, branch, probe), losses, and how to install
them.

Import from the modules: `install.use_parts`, `mask.KeyMask`, `branch.Branch`, `probe.TokenMapProbe`,
`early_exit.run_until`, `losses`. Nothing heavy is imported here.
"""
