"""The routes, one file each kind; `add_to(app, state)` in every one."""
