"""An OpenAI-compatible server over one loaded model, and a web chat.

    client ─► routes (checks, prompt ─► ids) ─► runner (the engine's thread) ─► events ─► client

The event loop never runs the model, and the engine's thread never writes to a socket: a slow client
holds nobody up, and a long prompt holds nobody up longer than one chunk of it (engine.scheduler).
"""
