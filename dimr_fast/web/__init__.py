"""A page in the browser that draws images and shows training runs: `dimr-fast web`."""

from dimr_fast.web.page import WebConfig, web

__all__ = ["WebConfig", "web"]
