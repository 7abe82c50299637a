"""Memory in three accounts: the law's (laws), the ledger's, written without running, and the allocator's."""
