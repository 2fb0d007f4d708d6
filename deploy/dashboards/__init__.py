"""Grafana's dashboards, as code: `python -m deploy.dashboards` writes their JSON."""
