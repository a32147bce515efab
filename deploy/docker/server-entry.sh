#!/bin/sh
# Serves. FEDTUNE_ADDRESS is where nodes reach this server, host:port. Join tokens are made on demand, so that none is
# in a log:  fedtune nodes invite NAME
set -eu
: "${FEDTUNE_ADDRESS:?set it to host:port at which nodes reach this server, such as my.server.example:9092}"
exec fedtune serve --address "$FEDTUNE_ADDRESS" --status "${FEDTUNE_STATUS:-0.0.0.0:9096}" "$@"
