"""Server reflection in both versions that clients ask for: grpc.reflection.v1 and the older grpc.reflection.v1alpha.

grpcio-reflection serves v1alpha only. The messages of v1 are the same under another package, so v1 is served by the
library's own servicer under the name of v1. Clients may ask for v1's own descriptor as for any other; it is
made from that of v1alpha.
"""

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

V1ALPHA_PACKAGE, V1_PACKAGE = "grpc.reflection.v1alpha", "grpc.reflection.v1"
V1_FILE = "grpc/reflection/v1/reflection.proto"
METHOD = "ServerReflectionInfo"


def _v1_descriptor() -> FileDescriptor:
    """The descriptor of v1, from the default pool, which gets it if it has none."""
    pool = descriptor_pool.Default()
    try:
        return pool.FindFileByName(V1_FILE)
    except KeyError:
        pool.AddSerializedFile(_renamed(reflection_pb2.DESCRIPTOR).SerializeToString())
        return pool.FindFileByName(V1_FILE)


def _renamed(v1alpha: FileDescriptor) -> descriptor_pb2.FileDescriptorProto:
    """The file of v1alpha as that of v1."""
    file = descriptor_pb2.FileDescriptorProto()
    v1alpha.CopyToProto(file)
    file.name, file.package = V1_FILE, V1_PACKAGE
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(V1ALPHA_PACKAGE, V1_PACKAGE)
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(V1ALPHA_PACKAGE, V1_PACKAGE)
        method.output_type = method.output_type.replace(V1ALPHA_PACKAGE, V1_PACKAGE)
    return file


DESCRIPTOR = _v1_descriptor()
SERVICE_NAMES = (f"{V1_PACKAGE}.ServerReflection", reflection.SERVICE_NAME)


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Serves both versions. services: the full names of the services to list, these two apart."""
    servicer = reflection.aio.ReflectionServicer([*services, *SERVICE_NAMES])
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    v1 = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAMES[0], {METHOD: v1}),))
