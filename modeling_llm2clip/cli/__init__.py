"""The command line; its flags are generated from annotations and `configs`.

Each command has a module with the same name; `__main__.py` lists the commands. The other modules
are shared.
"""
