"""The command `triptych`. Its modules import what is slow only when it is used."""
