// Peer: Go's net/http with MongoDB's own driver.
package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"os"

	"go.mongodb.org/mongo-driver/mongo"
	"go.mongodb.org/mongo-driver/mongo/options"
)

func main() {
	secret := []byte(os.Getenv("SEGMENT_SHARED_SECRET"))
	uri := options.Client().ApplyURI(os.Getenv("MONGODB_URI"))
	client, err := mongo.Connect(context.Background(), uri)
	if err != nil {
		log.Fatal(err)
	}
	collection := client.Database(os.Getenv("MONGODB_DATABASE")).Collection("events")

	http.HandleFunc("/webhook", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			answer(w, http.StatusBadRequest, map[string]any{"error": err.Error()})
			return
		}
		digest := hmac.New(sha1.New, secret)
		digest.Write(body)
		expected := hex.EncodeToString(digest.Sum(nil))
		if !hmac.Equal([]byte(expected), []byte(r.Header.Get("X-Signature"))) {
			why := "X-Signature does not match the body"
			answer(w, http.StatusUnauthorized, map[string]any{"error": why})
			return
		}
		var event map[string]any
		if err := json.Unmarshal(body, &event); err != nil {
			answer(w, http.StatusBadRequest, map[string]any{"error": err.Error()})
			return
		}
		event["_id"] = event["messageId"]
		if _, err := collection.InsertOne(r.Context(), event); err != nil {
			answer(w, http.StatusServiceUnavailable, map[string]any{"error": err.Error()})
			return
		}
		answer(w, http.StatusOK, map[string]any{"insertedId": event["_id"]})
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}

func answer(w http.ResponseWriter, status int, value map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(value)
}
