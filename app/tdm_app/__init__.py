"""The HTTP service in OpenAI's Images shape, and the web page on the same engine.

`server.run_server` is the command line's door, `api.create_app` the door for anyone who runs the ASGI app
themselves. Everything about pictures is in `tdm_serve`; this package only speaks HTTP.
"""
