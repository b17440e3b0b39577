"""A library served by GraphQL: parallel resolvers, mutations in one transaction, subscriptions."""
