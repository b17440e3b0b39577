"""Tests of the shop in a sandbox: each test starts with the migrated, empty databases."""

import pytest
from fastapi.testclient import TestClient

from fastapi_async_sqlalchemy.testing import Sandbox


@pytest.mark.parametrize("turn", [1, 2])
def test_product_is_added(sandbox_client: TestClient, client_sandbox: Sandbox, turn: int) -> None:
    """Both databases commit, and the name is free again in the second run."""
    assert sandbox_client.post("/products", params={"name": "tea"}).status_code == 201, turn
    assert client_sandbox.commits == 2
