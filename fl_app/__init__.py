"""Training across organisations: silos keep their data and send updates. Depends on `shared`
only.
"""
