"""The inspection service: what answers HTTP requests with a registry's models, on Ray Serve. See docs/use/serving.md."""
