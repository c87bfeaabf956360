"""The web page: live charts, a timeline of requests, a chat playground."""
