"""The command line; its flags are generated from annotations and `configs`.

Each command has a module of its name; `__main__.py` lists them. The other modules are shared.
"""
