"""The built pages, in a browser: ``make browser``."""
