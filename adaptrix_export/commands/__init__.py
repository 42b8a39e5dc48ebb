"""The commands, a module each: options in, one call of the library, its result out."""
