"""Private, patched and renamed names of other libraries: a module for each library.

Every entry says in its docstring which versions it was seen with ("Seen in") and what breaks
without it ("Without it"). The rest of the package uses such names only through these modules;
`tests/compat/test_private_names.py` checks both.
"""
