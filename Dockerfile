# syntax=docker/dockerfile:1
# All of Belay in one image: operator, gateway, harness and command line differ by entrypoint only, so that a task's sidecar is
# by construction the release that the operator was tested with.
#
#   docker build -t belay .                                  from the public bases below
#   docker build --build-arg RUNTIME_BASE=… -t belay .       from your own; it needs glibc and libgcc, and no shell
#   make image                                               on bases made from Debian's packages, without any registry
ARG BUILD_BASE=docker.io/library/rust:1.95-bookworm
ARG RUNTIME_BASE=gcr.io/distroless/cc-debian12

FROM ${BUILD_BASE} AS build
WORKDIR /src
# .dockerignore is an allow-list: what is not named there is not part of the build.
COPY . .
# The caches outlive the step, the binaries must not: they are copied out of target/ before it is taken away. Cargo tells stale from
# fresh by time stamps, and a cache may have seen a newer tree than this one: touched, our own crate is always compiled.
RUN --mount=type=cache,id=belay-registry,target=/usr/local/cargo/registry \
    --mount=type=cache,id=belay-target,target=/src/target \
    touch src/lib.rs src/bin/*.rs \
    && cargo build --release --locked --bin belay --bin belay-operator --bin belay-gateway --bin belay-harness \
    && mkdir /out \
    && cp target/release/belay target/release/belay-operator target/release/belay-gateway target/release/belay-harness /out/

FROM ${RUNTIME_BASE}
COPY --from=build /out/ /
# Numeric, so that `runAsNonRoot` can be checked without a passwd file.
USER 65532:65532
ENTRYPOINT ["/belay"]
