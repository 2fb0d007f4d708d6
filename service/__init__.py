"""The gateway: HTTP in, jobs out. `app.create_app` builds it; nothing here knows torch or RQ."""
