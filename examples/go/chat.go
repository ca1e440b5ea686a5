// Streams one chat from a Tandem server: tandem-chat HOST:PORT QUESTION
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	tandemv1 "tandem-chat/tandem/v1"
)

func chat(ctx context.Context, address, question string) error {
	// From grpc 1.63 on, grpc.NewClient and insecure.NewCredentials are the names to use. Debian 12 has grpc 1.33.
	connection, err := grpc.DialContext(ctx, address, grpc.WithInsecure())
	if err != nil {
		return err
	}
	defer connection.Close()
	request := &tandemv1.GenerateStreamRequest{
		Prompt: &tandemv1.Prompt{Chat: &tandemv1.Chat{
			Messages: []*tandemv1.ChatMessage{{Role: "user", Content: proto.String(question)}},
		}},
		Sampling: &tandemv1.SamplingParams{Temperature: proto.Float32(0)},
		Stopping: &tandemv1.StoppingCriteria{MaxTokens: proto.Uint32(128)},
	}
	stream, err := tandemv1.NewInferenceServiceClient(connection).GenerateStream(ctx, request)
	if err != nil {
		return err
	}
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Print(message.GetTextDelta())
		if finish := message.GetFinish(); finish != nil {
			reason := strings.TrimPrefix(finish.GetReason().String(), "FINISH_REASON_")
			fmt.Fprintf(os.Stderr, "\n[%s]\n", reason)
		}
	}
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: tandem-chat HOST:PORT QUESTION")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := chat(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", status.Code(err), status.Convert(err).Message())
		if status.Code(err) == codes.Canceled {
			os.Exit(130)
		}
		os.Exit(1)
	}
}
