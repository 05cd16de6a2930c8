"""The command line, its flags generated from annotations and from `configs`.

A module that has a command's name is that command; `__main__.py` lists the commands. All other
modules are shared by them.
"""
